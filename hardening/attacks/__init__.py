"""Attacks, one a file. All work on images in [0, 1], clip there, and never touch a weight's gradient."""
