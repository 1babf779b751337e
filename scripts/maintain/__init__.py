"""What keeps the package right: style, transformers' suites, other people's tools, kernels compiled without a GPU."""
