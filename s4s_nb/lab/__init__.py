"A cell of a table is a function and a record: models to judge on, methods to judge, runs over many cells."
