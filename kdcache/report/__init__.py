"""One page of finished runs: `build` collects, `template.html` shows."""
