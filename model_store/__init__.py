"""The contract between hardening and serving: what a bundle is, how it is checked, how an image becomes pixels.

This room imports neither `hardening` nor `service`; both import it.
"""
