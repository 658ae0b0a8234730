"From records to the tables, figures and claims of the S4S paper."
