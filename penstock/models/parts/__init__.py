"""What several models are made of: inputs taken apart, fields, linear terms, MLPs."""
