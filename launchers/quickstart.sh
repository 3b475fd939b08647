#!/usr/bin/env bash
# The main job from nothing: environment, corpus, tokenizer, two training runs, a table, a picture, generated text.
# Arguments are overrides for both runs, as `overtok train` takes them: launchers/quickstart.sh training.seed=2
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_extra quickstart
exec .venv/bin/python launchers/quickstart.py "$@"
