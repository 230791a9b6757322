"""How well membership scores do on texts whose membership is known, and before and after."""
