/** Convolutions on the emulated GPU. */
import { convolutionSuite } from "../support/kernel_suites/convolutions.ts";

convolutionSuite();
