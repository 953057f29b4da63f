"""Online: a bundle in, HTTP out."""
