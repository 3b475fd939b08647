"""The verbs of `overtok`, by room; each module has `add_verbs`. Every verb is a thin call into one room."""
