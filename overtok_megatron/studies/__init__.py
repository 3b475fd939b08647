"""Studies: grids of runs that answer a question, and their tables and pictures. How to write one: README.md.

| file | what is there |
| --- | --- |
| `study_file.py` | the YAML file of a study: its schema, and the errors of its mistakes |
| `derived.py` | values in units of others: `16 x V`, `0.5 x base`, `epochs: 2` |
| `corpora.py` | the text of a study: tokenizer and sets, made once |
| `cells.py` | one run each: its overrides and its fingerprint |
| `running.py` | the cells one after the other, as `overtok train` |
| `testing.py` | the test set, read once per cell |
| `origin.py` | commit, processor and torch that computed a cell |
| `results.py` | the file with a line of JSON per finished cell |
| `comparing.py` | means over seeds, paired differences, fitted lines, speed-up |
| `tables.py` | the report in Markdown |
| `pictures.py`, `drawing.py` | the pictures, and how they look |
"""
