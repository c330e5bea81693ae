"""Small tools without knowledge of models, data or runs."""
