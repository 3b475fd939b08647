"""What trained models are worth: runs compared by their curves."""
