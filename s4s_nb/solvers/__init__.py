"The classical methods and searched time grids, as tables that the one loop runs."
