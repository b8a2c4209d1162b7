"""What several tests share: models, examples, and the Hugging Face reference of a step."""
