/** Random numbers on the emulated GPU. */
import { randomSuite } from "../support/kernel_suites/random.ts";

randomSuite();
