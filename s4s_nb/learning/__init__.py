"Gradients into the table: pairs of a teacher, students, and the algorithms that fit them."
