"""The transformer: OLMo2's dense backbone as a list of layers. Groups come in as arguments; nothing here asks for a rank."""
