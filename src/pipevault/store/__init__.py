"""The vault on disk. The class to use is :class:`pipevault.store.vault.Vault`; imports no torch."""
