"""Where references live. Import the modules directly."""
