"""`python -m cli` is `twogate`, for where the script is not on the path."""

from cli.main import app

app(prog_name="twogate")
