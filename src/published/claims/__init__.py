"""The claims ledger: what the paper reports, each number beside what its runs give (docs/claims.md)."""
