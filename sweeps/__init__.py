"""Many runs side by side: the table, its pictures, the published figures, and what happens at the end of a multirun."""
