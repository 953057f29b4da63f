"""Measure a finished bundle as an attacker would: records, one a number, and a report that is rendered from them alone."""
