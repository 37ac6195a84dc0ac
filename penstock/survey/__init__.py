"""What is found out about unknown data: its columns, their roles, and a first job for it."""
