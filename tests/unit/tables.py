"""The texts of a rich table."""


def cells(table):
    """Rows of a table, as they were given."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]
