/** Matrix products with an activation or of float8, and quantization, on the emulated GPU. */
import { float8Suite } from "../support/kernel_suites/float8.ts";

float8Suite();
