"""From text files to token files: finding, reading, encoding and writing a corpus."""
