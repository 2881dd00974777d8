"""What several tests use: small pipelines, stand-ins, made-up vaults and records."""
