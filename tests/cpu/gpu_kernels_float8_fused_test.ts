/** Operators that quantize their results, on the emulated GPU. */
import { float8FusedSuite } from "../support/kernel_suites/float8_fused.ts";

float8FusedSuite();
