/** Linear layers of a few rows by float8 weights, on the emulated GPU. */
import { linearFewRowsSuite } from "../support/kernel_suites/linear_few_rows.ts";

linearFewRowsSuite();
