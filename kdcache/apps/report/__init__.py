"""One HTML page of finished runs: `build` collects, `template.html` shows."""
