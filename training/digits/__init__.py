"""Train, export and judge the text-to-video demo model on real handwritten digits."""
