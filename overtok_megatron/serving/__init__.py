"""A trained model behind HTTP: requests of OpenAI's completions API, decoded together as they come."""
