"""Shared helpers of the tests: models, examples, and the Hugging Face reference of a step."""
