"""Enhancement modules in other multimodal models."""
