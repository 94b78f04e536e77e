"""The model: loading, adapters on named parts, generation."""
