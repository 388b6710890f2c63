"""How good a run was, and what to do next: judgement, advice, and the ledger of runs."""
