"""HTTP: traces, datasets and runs, a dashboard, and an OpenAI-compatible endpoint."""
