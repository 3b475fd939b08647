"""Text from a trained model: loading a checkpoint of any layout, decoding with a cache and an n-gram history."""
