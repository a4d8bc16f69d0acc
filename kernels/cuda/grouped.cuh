/* The choices of one expert that a block multiplies, see experts.cu.  In a product with GROUPED, the
 * rows are choices sorted by expert: choice c reads row c / chosen_of_x of x, and writes row c of out.
 * The weights of all experts lie one after the other, row_tiles tiles of rows each. */
struct Group {
    int expert, first, num_rows, unused; /* `first`: among the sorted choices */
};
