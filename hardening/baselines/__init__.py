"""Other published defences of the same kind, trained on the same data, to compare with."""
