"""Results for people: terminal, HTML, video. Import the modules directly."""
