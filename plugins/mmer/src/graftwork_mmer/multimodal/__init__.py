"""From media and text to the embeddings and routes that a routed model reads."""
