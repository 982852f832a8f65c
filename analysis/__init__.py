"""The paper's three measurements of token embeddings."""
