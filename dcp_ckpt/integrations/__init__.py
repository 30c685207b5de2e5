"""Other programs' formats and frameworks; each module imports its own when it is used."""
