"""An OpenAI-compatible LLM server that one machine can run from plain Python."""
