"""Text from a trained model: loading a checkpoint of any layout, decoding with a key/value cache, batches that change."""
