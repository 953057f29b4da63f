"""The endpoints: one file per path of the contract, and what they share."""
