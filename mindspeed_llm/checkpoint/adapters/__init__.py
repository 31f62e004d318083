"""LoRA adapters of any origin as one thing: factors by logical name, settings by logical module."""
