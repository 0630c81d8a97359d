"""Judge `endpoint`: address and key, requests and their pace, rubrics, errors, cached answers."""
