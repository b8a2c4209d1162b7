"""Rollouts by SGLang servers, over HTTP."""
