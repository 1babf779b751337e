"""
The Reformer's layers, operators and models; one idea of the paper per file.

The import below is also what stops `import modeling` from the repository's root, where the package has another name.
"""

from ..configuration.configuration_reformer import ReformerConfig as ReformerConfig
