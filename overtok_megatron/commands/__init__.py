"""The verbs of `overtok`. Each module has `add_verbs`; a verb parses its arguments and calls one room of the package."""
